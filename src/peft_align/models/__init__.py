"""Models: bases loaded once, adapters made and kept, responses scored."""
