"""The nouns: what a testbed consists of. Imports nothing else of this project."""
