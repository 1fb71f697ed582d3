"""What the autoscaler sees: ``window`` holds demand as means over the stable and panic windows."""
