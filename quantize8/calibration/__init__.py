"""What a text does to a model: outliers of its activations, errors, and what follows for a conversion."""
