"""Loading into modules: what they have, what their own loading would do, and bytes brought to their places."""
