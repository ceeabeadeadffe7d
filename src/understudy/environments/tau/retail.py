"""A retail shop as tau-bench states it: its database, and tools of our own that read and change it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from understudy.environments.tau.database import Desk

OrderId = Annotated[str, "The order's id, such as #W0000000, with the # in front."]
UserId = Annotated[str, "The user's id, such as sara_doe_496."]
PaymentId = Annotated[str, "The id of a payment method in the user's profile, such as gift_card_0000000."]
ItemIds = Annotated[list[str], "The items' ids, one for each item: an id may stand there twice."]
Street = Annotated[str, "Street and number."]
Suite = Annotated[str, "Suite or apartment; may be empty."]
City = Annotated[str, "The city."]
State = Annotated[str, "The state, such as CA."]
Country = Annotated[str, "The country, such as USA."]
ZipCode = Annotated[str, "The zip code."]
NewItemIds = Annotated[list[str], "The ids of the new items, in the order of those that they replace."]


class Retail(Desk):
    """The tools of one episode; each changes `database`. Raises ValueError for what cannot be done."""

    def find_user_id_by_email(self, email: Annotated[str, "The user's email."]) -> str:
        """Finds a user by email."""
        for user_id, user in self.database.rows("users"):
            if user["email"].lower() == email.strip().lower():
                return user_id
        raise ValueError("there is no user with this email")

    def find_user_id_by_name_zip(
        self,
        first_name: Annotated[str, "The user's first name."],
        last_name: Annotated[str, "The user's last name."],
        zip: Annotated[str, "The zip code of the user's address."],
    ) -> str:
        """Finds a user by name and zip code. Use it only if the user cannot be found by email."""
        told = first_name.strip().lower(), last_name.strip().lower(), zip.strip()
        for user_id, user in self.database.rows("users"):
            name = user["name"]
            if (name["first_name"].lower(), name["last_name"].lower(), user["address"]["zip"]) == told:
                return user_id
        raise ValueError("there is no user with this name and zip code")

    def get_user_details(self, user_id: UserId) -> Any:
        """Returns a user's profile: name, address, email, payment methods, ids of orders."""
        return self.database.read("users", user_id)

    def get_order_details(self, order_id: OrderId) -> Any:
        """Returns an order with its status, items, address and payments."""
        return self.database.read("orders", order_id)

    def get_product_details(self, product_id: Annotated[str, "The product's id, which is not an item's."]) -> Any:
        """Returns a product with all of its variants: their item ids, options, availability and prices."""
        return self.database.read("products", product_id)

    def list_all_product_types(self) -> Any:
        """Returns the name of each of the shop's products with its id."""
        return {product["name"]: product_id for product_id, product in sorted(self.database.rows("products"))}

    def cancel_pending_order(
        self,
        order_id: OrderId,
        reason: Annotated[Literal["no longer needed", "ordered by mistake"], "The user's reason."],
    ) -> Any:
        """Cancels a pending order and refunds it. Ask the user to confirm it first."""
        order = self._order(order_id, "pending")
        order["payment_history"] += [
            self._refund(order, paid["payment_method_id"], paid["amount"]) for paid in order["payment_history"]
        ]
        order["status"], order["cancel_reason"] = "cancelled", reason
        return order

    def modify_pending_order_address(
        self,
        order_id: OrderId,
        address1: Street,
        address2: Suite,
        city: City,
        state: State,
        country: Country,
        zip: ZipCode,
    ) -> Any:
        """Changes the shipping address of a pending order. Ask the user to confirm it first."""
        order = self._order(order_id, "pending")
        order["address"] = _address(address1, address2, city, state, country, zip)
        return order

    def modify_user_address(
        self,
        user_id: UserId,
        address1: Street,
        address2: Suite,
        city: City,
        state: State,
        country: Country,
        zip: ZipCode,
    ) -> Any:
        """Changes the default address of a user. Ask the user to confirm it first."""
        user = self.database.edit("users", user_id)
        user["address"] = _address(address1, address2, city, state, country, zip)
        return user

    def modify_pending_order_payment(self, order_id: OrderId, payment_method_id: PaymentId) -> Any:
        """Lets a pending order be paid by another method, and refunds the first. Ask the user to confirm it first."""
        order = self._order(order_id, "pending")
        if [paid["transaction_type"] for paid in order["payment_history"]] != ["payment"]:
            raise ValueError("the order has more than one payment, or a refund")
        (paid,) = order["payment_history"]
        if paid["payment_method_id"] == payment_method_id:
            raise ValueError("the order is paid by this method already")
        bill = self._pay(order, payment_method_id, paid["amount"])
        order["payment_history"] += [bill, self._refund(order, paid["payment_method_id"], paid["amount"])]
        return order

    def modify_pending_order_items(
        self, order_id: OrderId, item_ids: ItemIds, new_item_ids: NewItemIds, payment_method_id: PaymentId
    ) -> Any:
        """Replaces items of a pending order by others of the same products, once in an order. The difference in price is
        paid or refunded by the method. Ask the user to confirm it first, and whether these are all the items."""
        order = self._order(order_id, "pending")
        chosen = self._exchanged(order, item_ids, new_item_ids)
        difference = round(sum(new["price"] - old["price"] for old, new in chosen), 2)
        order["payment_history"].append(self._settle(order, payment_method_id, difference))
        for old, new in chosen:
            old.update(item_id=new["item_id"], price=new["price"], options=new["options"])
        order["status"] = "pending (items modified)"
        return order

    def exchange_delivered_order_items(
        self, order_id: OrderId, item_ids: ItemIds, new_item_ids: NewItemIds, payment_method_id: PaymentId
    ) -> Any:
        """Exchanges items of a delivered order for others of the same products, once in an order. The difference in price
        is paid or refunded by the method. Ask the user to confirm it first, and whether these are all the items."""
        order = self._order(order_id, "delivered")
        chosen = self._exchanged(order, item_ids, new_item_ids)
        difference = round(sum(new["price"] - old["price"] for old, new in chosen), 2)
        method = self._method(order, payment_method_id)
        if method["source"] == "gift_card" and method["balance"] < difference:
            raise ValueError("the gift card has not enough balance for the difference in price")
        order["status"] = "exchange requested"
        order["exchange"] = {
            "items": sorted([old["item_id"], new["item_id"]] for old, new in chosen),
            "payment_method_id": payment_method_id,
            "price_difference": difference,
        }
        return order

    def return_delivered_order_items(self, order_id: OrderId, item_ids: ItemIds, payment_method_id: PaymentId) -> Any:
        """Returns items of a delivered order. The refund goes to the order's own payment method or to a gift card. Ask the
        user to confirm it first."""
        order = self._order(order_id, "delivered")
        self._items(order, item_ids)
        method = self._method(order, payment_method_id)
        if method["source"] != "gift_card" and payment_method_id != order["payment_history"][0]["payment_method_id"]:
            raise ValueError("the refund must go to the order's payment method or to a gift card")
        order["status"] = "return requested"
        order["return"] = {"items": sorted(item_ids), "payment_method_id": payment_method_id}
        return order

    def _order(self, order_id: str, status: str) -> Any:
        """The order, to be changed."""
        found = self.database.read("orders", order_id)["status"]
        if found != status:
            raise ValueError(f"the order is {found}, and not {status}")
        return self.database.edit("orders", order_id)

    def _method(self, order: Any, payment_id: str) -> Any:
        """A payment method of the order's user, to be changed."""
        methods = self.database.edit("users", order["user_id"])["payment_methods"]
        if payment_id not in methods:
            raise ValueError(f"the user has no payment method {payment_id}; there are {', '.join(methods)}")
        return methods[payment_id]

    def _pay(self, order: Any, payment_id: str, amount: float) -> dict[str, Any]:
        method = self._method(order, payment_id)
        if method["source"] == "gift_card":
            if method["balance"] < amount:
                raise ValueError("the gift card has not enough balance")
            method["balance"] = round(method["balance"] - amount, 2)
        return {"transaction_type": "payment", "amount": amount, "payment_method_id": payment_id}

    def _refund(self, order: Any, payment_id: str, amount: float) -> dict[str, Any]:
        method = self._method(order, payment_id)
        if method["source"] == "gift_card":
            method["balance"] = round(method["balance"] + amount, 2)
        return {"transaction_type": "refund", "amount": amount, "payment_method_id": payment_id}

    def _settle(self, order: Any, payment_id: str, difference: float) -> dict[str, Any]:
        return (
            self._pay(order, payment_id, difference) if difference > 0 else self._refund(order, payment_id, -difference)
        )

    def _items(self, order: Any, item_ids: list[str]) -> list[Any]:
        """An item of the order for each id; an id that stands twice needs two items."""
        left, found = list(order["items"]), []
        for item_id in item_ids:
            item = next((item for item in left if item["item_id"] == item_id), None)
            if item is None:
                raise ValueError(f"the order has no item {item_id}, or not as many as are named")
            left = [other for other in left if other is not item]
            found.append(item)
        if not found:
            raise ValueError("no items are named")
        return found

    def _exchanged(self, order: Any, item_ids: list[str], new_item_ids: list[str]) -> list[tuple[Any, Any]]:
        """Items of the order with the variants that replace them."""
        if len(item_ids) != len(new_item_ids):
            raise ValueError("there must be as many new items as items")
        pairs = []
        for item, new_id in zip(self._items(order, item_ids), new_item_ids, strict=True):
            variant = self.database.read("products", item["product_id"])["variants"].get(new_id)
            if variant is None:
                raise ValueError(f"the item {new_id} is of another product than {item['item_id']}")
            if not variant["available"]:
                raise ValueError(f"the item {new_id} is not available")
            pairs.append((item, variant))
        return pairs


def _address(address1: str, address2: str, city: str, state: str, country: str, zip_code: str) -> dict[str, str]:
    return {
        "address1": address1,
        "address2": address2,
        "city": city,
        "state": state,
        "country": country,
        "zip": zip_code,
    }
