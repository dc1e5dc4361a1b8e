"""The Ray cluster: connecting, placement, waiting, elasticity."""
