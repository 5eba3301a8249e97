"""The ops. One folder each: api.py (docs, validation, dispatch), reference.py (the specification in plain torch)."""
