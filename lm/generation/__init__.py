"""From logits to text: options → filters → draw → decoder → text."""
