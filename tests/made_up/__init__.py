"""A GPU that does not exist, as a target of ours would be: for tests/test_new_target.py."""
