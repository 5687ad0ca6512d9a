"""From video files to tensors, and back."""
