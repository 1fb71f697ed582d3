"""What demand will be: quantiles per step, and of the maximum over a lead window.

``types`` what goes in and comes out.
"""
