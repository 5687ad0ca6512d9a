"""Measurements, in rooms: ``op``, ``models``, ``experiments``, ``demo``, and ``gpu``.

Each room's first file says what is in it. What the rooms share is here: ``timing`` (a clock, a
high-water mark of memory), ``rows`` (what a row of measurements says, and how it is kept),
``options`` (of their commands), ``clip`` (the real clip) and ``patches`` (a fixed transform of its
pictures). And so is what came of them: figures are rows of ``results.jsonl``
(the operator), ``block.jsonl``, ``vae.jsonl`` and ``cache.jsonl`` (the models); what was expected
and what was found is told in ``NOTES.md``.
"""

if __name__ == "bench":
    raise ImportError("import skiparse.bench; this folder is installed under that name")
