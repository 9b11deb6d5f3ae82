"""The command lines, each a function of its arguments: ``lrt NAME``, tools/NAME.py and recipes/run.py."""
