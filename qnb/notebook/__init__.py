"""What a notebook adds: the magics and the figures. Nothing here measures or changes a model by itself."""
