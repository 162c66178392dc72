"""From rows of records to what is printed."""
