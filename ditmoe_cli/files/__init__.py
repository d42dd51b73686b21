"""Files on disk: headers, tensor names, containers, pickles, reader, writer, staging, provenance, fingerprints."""
