"""What `compare` is made of: pairs of tensors and values, renames found by content, and the words for what differs."""
