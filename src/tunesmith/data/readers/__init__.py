"""Files of any supported type to rows."""
