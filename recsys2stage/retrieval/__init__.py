"""First stage: two-tower retriever, its training data, and the index that serves it."""
