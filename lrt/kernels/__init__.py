"""What is fast about one operation: attention over groups of keys, the mixing operator, sums of gradients."""
