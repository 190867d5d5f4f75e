"""The local page (``tools/studio.py``): forms for the options, runs that go on without it, a queue."""
