"""An airline as tau-bench states it: its database, and tools of our own that read and change it."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypedDict

from understudy.environments.tau.database import Desk

NOW = "2024-05-15T15:00:00"
"""The time of the policy."""
BAG_PRICE, INSURANCE_PRICE = 50, 30
MAX_PASSENGERS = 5
AIRPORTS = {
    "ATL": "Atlanta",
    "BOS": "Boston",
    "CLT": "Charlotte",
    "DEN": "Denver",
    "DFW": "Dallas",
    "DTW": "Detroit",
    "EWR": "Newark",
    "IAH": "Houston",
    "JFK": "New York",
    "LAS": "Las Vegas",
    "LAX": "Los Angeles",
    "LGA": "New York",
    "MCO": "Orlando",
    "MIA": "Miami",
    "MSP": "Minneapolis",
    "ORD": "Chicago",
    "PHL": "Philadelphia",
    "PHX": "Phoenix",
    "SEA": "Seattle",
    "SFO": "San Francisco",
}


class FlightOn(TypedDict):
    """A flight on a day."""

    flight_number: Annotated[str, "The flight's number, such as HAT001."]
    date: Annotated[str, "The day, as YYYY-MM-DD."]


class Passenger(TypedDict):
    """Who flies."""

    first_name: str
    last_name: str
    dob: Annotated[str, "The date of birth, as YYYY-MM-DD."]


class Payment(TypedDict):
    """A part of the price."""

    payment_id: Annotated[str, "The id of a payment method in the user's profile."]
    amount: Annotated[float, "What it pays, in dollars."]


Cabin = Annotated[Literal["basic_economy", "economy", "business"], "The cabin, the same for all flights."]
UserId = Annotated[str, "The user's id, such as sara_doe_496."]
ReservationId = Annotated[str, "The reservation's id, such as 8JX2WO."]
PaymentId = Annotated[str, "The id of a gift card or credit card in the user's profile."]
Airport = Annotated[str, "The airport's code of three letters, such as JFK."]
Date = Annotated[str, "The day, as YYYY-MM-DD."]


class Airline(Desk):
    """The tools of one episode; each changes `database`. Raises ValueError for what cannot be done.

    What the policy leaves to the agent (who may cancel, what may be modified) is not checked here.
    """

    def get_user_details(self, user_id: UserId) -> Any:
        """Returns a user's profile: name, membership, payment methods, ids of reservations."""
        return self.database.read("users", user_id)

    def get_reservation_details(self, reservation_id: ReservationId) -> Any:
        """Returns a reservation with its flights, passengers, baggage and payments."""
        return self.database.read("reservations", reservation_id)

    def list_all_airports(self) -> Any:
        """Returns the airports' codes with their cities."""
        return AIRPORTS

    def search_direct_flight(self, origin: Airport, destination: Airport, date: Date) -> Any:
        """Returns the flights between two airports on a day that can be booked, with seats and prices."""
        return self._available(origin, destination, date)

    def search_onestop_flight(self, origin: Airport, destination: Airport, date: Date) -> Any:
        """Returns pairs of flights with one stop between two airports that can be booked, the first of them on the day."""
        found = []
        for first in self._available(origin, None, date):
            arrival, _, overnight = first["scheduled_arrival_time_est"].partition("+")
            day = _next_day(date) if overnight else date
            found += [
                [first, second]
                for second in self._available(first["destination"], destination, day)
                if second["scheduled_departure_time_est"] >= arrival
            ]
        return found

    def book_reservation(
        self,
        user_id: UserId,
        origin: Airport,
        destination: Airport,
        flight_type: Annotated[Literal["one_way", "round_trip"], "The type of the trip."],
        cabin: Cabin,
        flights: Annotated[list[FlightOn], "All flights, those of the way back too."],
        passengers: Annotated[list[Passenger], "All passengers, five at most."],
        payment_methods: Annotated[list[Payment], "What pays the whole price."],
        total_baggages: Annotated[int, "All checked bags."],
        nonfree_baggages: Annotated[int, "Those of them that are paid."],
        insurance: Annotated[Literal["yes", "no"], "Whether travel insurance is bought."],
    ) -> Any:
        """Books a reservation. Ask the user to confirm it first."""
        user = self.database.edit("users", user_id)
        if not flights or not 0 < len(passengers) <= MAX_PASSENGERS:
            raise ValueError(f"a reservation has flights, and 1 to {MAX_PASSENGERS} passengers")
        booked = [self._seat(flight, cabin, len(passengers)) for flight in flights]
        price = sum(flight["price"] for flight in booked) * len(passengers) + BAG_PRICE * nonfree_baggages
        price += INSURANCE_PRICE * len(passengers) if insurance == "yes" else 0
        paid = sum(payment["amount"] for payment in payment_methods)
        if abs(paid - price) > 0.005:
            raise ValueError(f"the payments are {paid:g} in all, and the price is {price:g}")
        for payment in payment_methods:
            self._pay(user, payment["payment_id"], payment["amount"])
        number = sum(key.startswith("NEW") for key, _ in self.database.rows("reservations")) + 1
        reservation = {
            "reservation_id": f"NEW{number:03d}",
            "user_id": user_id,
            "origin": origin,
            "destination": destination,
            "flight_type": flight_type,
            "cabin": cabin,
            "flights": booked,
            "passengers": passengers,
            "payment_history": payment_methods,
            "created_at": NOW,
            "total_baggages": total_baggages,
            "nonfree_baggages": nonfree_baggages,
            "insurance": insurance,
        }
        user["reservations"].append(reservation["reservation_id"])
        self.database.add("reservations", f"NEW{number:03d}", reservation)
        return reservation

    def cancel_reservation(self, reservation_id: ReservationId) -> Any:
        """Cancels a whole reservation and refunds it. Ask the user to confirm it first."""
        reservation = self.database.edit("reservations", reservation_id)
        if reservation.get("status") == "cancelled":
            raise ValueError("the reservation is cancelled already")
        reservation["payment_history"] += [
            {"payment_id": paid["payment_id"], "amount": -paid["amount"]} for paid in reservation["payment_history"]
        ]
        reservation["status"] = "cancelled"
        return reservation

    def send_certificate(self, user_id: UserId, amount: Annotated[float, "In dollars."]) -> Any:
        """Gives a user a travel certificate."""
        methods = self.database.edit("users", user_id)["payment_methods"]
        number = sum(key.startswith("certificate_new") for key in methods) + 1
        certificate = {"source": "certificate", "amount": amount, "id": f"certificate_new{number}"}
        methods[certificate["id"]] = certificate
        return certificate

    def update_reservation_baggages(
        self,
        reservation_id: ReservationId,
        total_baggages: Annotated[int, "All checked bags after the change."],
        nonfree_baggages: Annotated[int, "Those of them that are paid."],
        payment_id: PaymentId,
    ) -> Any:
        """Changes the checked bags of a reservation. Ask the user to confirm it first."""
        reservation = self.database.edit("reservations", reservation_id)
        price = BAG_PRICE * max(0, nonfree_baggages - reservation["nonfree_baggages"])
        self._charge(reservation, payment_id, price)
        reservation.update(total_baggages=total_baggages, nonfree_baggages=nonfree_baggages)
        return reservation

    def update_reservation_flights(
        self,
        reservation_id: ReservationId,
        cabin: Cabin,
        flights: Annotated[list[FlightOn], "All flights after the change, those that stay too."],
        payment_id: PaymentId,
    ) -> Any:
        """Changes flights or cabin of a reservation; the difference in price is paid or refunded. Ask the user to confirm it
        first."""
        reservation = self.database.edit("reservations", reservation_id)
        if not flights:
            raise ValueError("no flights are named")
        num = len(reservation["passengers"])
        kept = {(flight["flight_number"], flight["date"]): flight for flight in reservation["flights"]}
        changed = []
        for flight in flights:
            old = kept.get((flight["flight_number"], flight["date"]))
            changed.append(old if old and cabin == reservation["cabin"] else self._seat(flight, cabin, num))
        before, after = (sum(flight["price"] for flight in some) for some in (reservation["flights"], changed))
        self._charge(reservation, payment_id, (after - before) * num)
        reservation.update(flights=changed, cabin=cabin)
        return reservation

    def update_reservation_passengers(
        self, reservation_id: ReservationId, passengers: Annotated[list[Passenger], "All passengers after the change."]
    ) -> Any:
        """Changes the passengers of a reservation, but not their number. Ask the user to confirm it first."""
        reservation = self.database.edit("reservations", reservation_id)
        if len(passengers) != len(reservation["passengers"]):
            raise ValueError("the number of passengers cannot be changed")
        reservation["passengers"] = passengers
        return reservation

    def _available(self, origin: str, destination: str | None, date: str) -> list[dict[str, Any]]:
        """Flights that can be booked on a day; `destination` None: to anywhere."""
        found = []
        for _, flight in self.database.rows("flights"):
            on = flight["dates"].get(date, {})
            goes = flight["origin"] == origin and flight["destination"] == (destination or flight["destination"])
            if goes and on.get("status") == "available":
                known = {key: value for key, value in flight.items() if key != "dates"}
                found.append({**known, "date": date, "available_seats": on["available_seats"], "prices": on["prices"]})
        return found

    def _seat(self, flight: FlightOn, cabin: str, num: int) -> dict[str, Any]:
        """A flight as a reservation has it. Raises ValueError where it cannot be booked."""
        number, date = flight["flight_number"], flight["date"]
        known = self.database.read("flights", number)
        on = known["dates"].get(date)
        if on is None:
            raise ValueError(f"the flight {number} does not go on {date}")
        if on["status"] != "available":
            raise ValueError(f"the flight {number} on {date} cannot be booked: {on['status']}")
        if on["available_seats"][cabin] < num:
            raise ValueError(f"the flight {number} on {date} has {on['available_seats'][cabin]} seats left in {cabin}")
        return {
            "flight_number": number,
            "origin": known["origin"],
            "destination": known["destination"],
            "date": date,
            "price": on["prices"][cabin],
        }

    def _pay(self, user: Any, payment_id: str, amount: float) -> None:
        methods = user["payment_methods"]
        if payment_id not in methods:
            raise ValueError(f"the user has no payment method {payment_id}; there are {', '.join(methods)}")
        method = methods[payment_id]
        if method["source"] == "credit_card":
            return
        if method["amount"] < amount:
            raise ValueError(f"{payment_id} has {method['amount']:g} left, which is not enough")
        # what a certificate has left is lost
        if method["source"] == "certificate":
            del methods[payment_id]
        else:
            method["amount"] -= amount

    def _charge(self, reservation: Any, payment_id: str, price: float) -> None:
        """A later payment for a reservation; a price below zero is refunded."""
        user = self.database.edit("users", reservation["user_id"])
        if user["payment_methods"].get(payment_id, {}).get("source") == "certificate":
            raise ValueError("a certificate cannot pay for a change")
        self._pay(user, payment_id, max(0, price))
        if price:
            reservation["payment_history"].append({"payment_id": payment_id, "amount": price})


def _next_day(date: str) -> str:
    """The next day of the month, which is May 2024 in all of the database."""
    return f"{date[:-2]}{int(date[-2:]) + 1:02d}"
