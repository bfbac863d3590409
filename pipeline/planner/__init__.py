"""Where the layers go: costs of layers, nodes and links (`problem`), what a placement comes to (`forecast`), and the
best one (`search`). Numbers only, nothing of a config, a model or torch. docs/planner.md has the formulas.
"""
