"""What ``make demo`` shows: the parts on a real clip, and the report that they are put into.

``attention``: dense and Skiparse attention of tokens made by a fixed transform.
``reconstruction``: what the autoencoder of ``experiments.reconstruct`` gives back. ``generate``:
from the clip to a generated video, by the library's own tools. ``report`` is the HTML, ``tour``
walks through all parts.
"""
