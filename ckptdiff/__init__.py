"""What did post-training change in this model?"""

__version__ = "0.1.0"
