"""A prepared dataset to a retriever and its index."""
