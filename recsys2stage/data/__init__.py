"""Raw events to a prepared dataset."""
