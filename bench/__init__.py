"""Times of the layer as ratios, all taken in one run: ours, transformers', torch's products alone, the machine's limit."""
