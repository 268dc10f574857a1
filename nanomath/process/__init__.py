"""Process rewards: the steps of a solution, the models that score them, and what a policy
earns for each.
"""
