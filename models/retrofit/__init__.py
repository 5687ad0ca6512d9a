"""Skiparse attention in the video transformers of diffusers, made sparse in place.

::

    from skiparse.models.retrofit import retrofit

    made = retrofit(pipe)                    # 2-D, ratio 2, a tenth of the layers dense at each end
    print(made)
    print(made.cost(frames=81, height=720, width=1280))
    made.save("lora/")                       # skiparse.json, beside the weights it goes with
    made.undo()

A model keeps its weights and its code; what its tokens attend to changes. So it has to be
fine-tuned: as it comes, it is worse than before. What is sparse is said in ``config["skiparse"]``
and goes through ``save_pretrained``; after ``from_pretrained``, ``retrofit(model)`` makes it so.
"""

from __future__ import annotations

from skiparse.models.retrofit.cost import Cost
from skiparse.models.retrofit.families import FAMILIES, Family
from skiparse.models.retrofit.greedy import choose
from skiparse.models.retrofit.model import Retrofit, Sparsity, retrofit, schedule

__all__ = [
    "FAMILIES", "Cost", "Family", "Retrofit", "Sparsity", "choose", "retrofit", "schedule",
]  # fmt: skip
