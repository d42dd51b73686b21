"""Features of images: extractors, Inception, statistics on disk."""
