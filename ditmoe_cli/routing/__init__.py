"""What the routers do: collected, stored, derived."""
