"""Measurements, in rooms: ``op``, ``models``, ``experiments``, ``demo``, and ``gpu``.

Each room's first file says what is in it. What came of them lies here: figures are rows of
``results.jsonl`` (the operator), ``block.jsonl``, ``vae.jsonl`` and ``cache.jsonl`` (the models);
what was expected and what was found is told in ``NOTES.md``.
"""

if __name__ == "bench":
    raise ImportError("import skiparse.bench; this folder is installed under that name")
