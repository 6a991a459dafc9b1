"""Pictures of plans: PNG and SVG by matplotlib."""
