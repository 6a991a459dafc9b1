"""Planning: from losses and a request to a plan, one type and one device for each tensor."""
