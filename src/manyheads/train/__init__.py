"""Recipes that train a model, as plain functions over Lightning Fabric; one file a recipe.

``lm`` a language model on text, ``classify`` a classifier of time series, ``recall`` multi-query
associative recall, ``vision`` a backbone on images, ``ia_red2`` one that drops patches,
``urpe_tasks`` the two position tasks of URPE; ``generate`` continues a prompt
with what ``lm`` trained. All need the extra ``train``.
"""
