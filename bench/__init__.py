"""Side-by-side measurements of Tidegate and its peers. Nothing in the packages imports this."""
