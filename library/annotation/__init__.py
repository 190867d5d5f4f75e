"""What models say about images that a dataset lacks: captions, and masks for the loss."""
