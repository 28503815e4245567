"""How property tests choose their examples: the same each time in `make test`, new ones in `make search`."""

from hypothesis import settings

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=3000, deadline=None, print_blob=True)
settings.load_profile("same")
