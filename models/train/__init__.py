"""What any training run needs: averages of weights."""
