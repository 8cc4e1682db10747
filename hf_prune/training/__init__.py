"""How a model recovers: schedules, and callbacks for any Trainer."""
