"""An encoder of deflate streams for masks; it knows no run file."""
