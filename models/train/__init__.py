"""What any training run needs: averages of weights, and clipping that follows the gradients."""

from skiparse.models.train.clip import AdaptiveGradClipper, Decision

__all__ = ["AdaptiveGradClipper", "Decision"]
