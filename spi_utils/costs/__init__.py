"""What quantizing a layer costs: the parts of `sensitivity`."""
