"""Files of any supported type as rows."""
