"""Where the layers go: costs of layers, nodes and links (`problem`), what a placement comes to (`forecast`), and the
best one (`search`); what passes of several tokens cost, and come to with drafts (`pass_costs`). Numbers only, nothing
of a config, a model or torch. docs/planner.md has the formulas, docs/drafts.md those of drafts.
"""
