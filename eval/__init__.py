"""The evaluation stage: synthetic images + class statistics -> accuracies."""
