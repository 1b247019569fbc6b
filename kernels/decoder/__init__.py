"""All layers of a decoder in one call; on other devices the layers are separate calls."""
