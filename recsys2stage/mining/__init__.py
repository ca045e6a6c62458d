"""An index and a dataset to candidate lists."""
