"""Results as documents: five kinds of blocks, and the renderers that show them as text, HTML and Markdown."""
