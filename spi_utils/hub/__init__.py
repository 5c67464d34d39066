"""Model card, gates and upload: the parts of `publish`."""
