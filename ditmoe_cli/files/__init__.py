"""Bytes on disk: headers, names, containers, the reader, the writer, metadata."""
