"""Vision models: images in, class logits and features out."""
