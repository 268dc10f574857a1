"""Training: one step of SFT or of policy gradient, the loop around it, and what a run leaves
on disk.
"""
