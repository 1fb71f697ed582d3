"""The past replayed on virtual time: what a policy would have cost, and whom it would have hurt.

``types`` what a policy sees and is.
"""
